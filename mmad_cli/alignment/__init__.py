"""Features onto the pixel grid and the patch grid: pure functions on arrays."""
