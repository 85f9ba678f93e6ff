"""How a step grows with devices: measured over few processes, and expected over many nodes."""
