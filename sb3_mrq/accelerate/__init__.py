"""
How updates run: on the host or on a device, compiled or captured, and in which precision.
"""
