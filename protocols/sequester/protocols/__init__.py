"""What hospital and consortium must agree on, to the byte.

Pure: no network, disk, clock or framework in here. Time, randomness and files are arguments.
"""
