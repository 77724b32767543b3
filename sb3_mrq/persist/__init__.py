"""
What outlives a process: checkpoints, stopping on a signal, files of models, weights and replay buffers.
"""
