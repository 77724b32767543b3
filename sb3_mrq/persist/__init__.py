"""
Checkpoints, stopping on a signal, and files of weights and replay buffers.
"""
