"""Images of requests: where they come from, and how they become what a vision tower takes."""
