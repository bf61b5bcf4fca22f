"""Speed, memory and bytes of bitfit beside stock parts, measured side by side in one call."""
