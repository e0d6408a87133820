"""What outlives a process, and what a process holds: tensors on disk, a machine's cache, modes of files, memory."""
