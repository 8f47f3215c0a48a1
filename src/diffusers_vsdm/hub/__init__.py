"""What makes the classes known to Diffusers and to the Hub."""
