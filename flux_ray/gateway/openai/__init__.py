"""OpenAI's image routes: their fields, the request made of them, and the answer, streamed or whole.

BFL's and Hugging Face's routes use the same fields and checks.
"""
