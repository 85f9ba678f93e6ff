"""AEPO inside other trainers: each module needs its trainer installed, and imports it."""
