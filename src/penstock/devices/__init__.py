"""What a device can do: memory, data types, threads."""
