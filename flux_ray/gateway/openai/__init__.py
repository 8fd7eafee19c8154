"""OpenAI's image routes.

Their fields, the request made of them, and the answer, streamed or whole.
"""
