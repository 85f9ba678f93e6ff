"""The C++ library on a CPU: its rows, GEMMs and layers, called through ctypes."""
