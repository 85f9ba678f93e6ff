"""The run's configuration: its sections, how TOML is read onto them, what "auto" becomes, and the
shipped presets.
"""
