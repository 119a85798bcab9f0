"""One report of everything on a Jetson: `make jetson`."""
