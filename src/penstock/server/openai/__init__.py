"""OpenAI's routes, and what its clients ask for beside them."""
