"""What a program runs on: the device mesh, processes on several machines, and defaults by platform."""
