"""What the tools share: drawing results, reading and writing pictures and videos, timing stages."""
