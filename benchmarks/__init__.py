"""Speed and memory, measured; tests never assert on either."""
