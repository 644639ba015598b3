"""What is measured of an arm: time, FLOPs, memory, and the machine that it was measured on."""
