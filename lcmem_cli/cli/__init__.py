"""The command line: parse, call one engine function, render. No tensor code, no heavy imports."""
