"""The engine: everything lcmem computes. It never prints, never exits and knows no terminal."""
