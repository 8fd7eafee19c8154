"""Which dialect a path is of: its errors have that dialect's shape."""

from typing import Literal

from starlette.requests import Request
from starlette.types import Scope

Dialect = Literal["openai", "bfl", "hugging_face"]
# Hugging Face's raw endpoint.
HUB = "/models/"
# ComfyUI's nodes send to BFL through their maker's server: `/proxy/bfl/<model>/generate`.
COMFY = "/proxy/bfl/"
GENERATE = "/generate"
# OpenAI's other routes of one word: who asks for them wants to read that in its words.
OPENAIS = {
    "assistants",
    "batches",
    "completions",
    "containers",
    "conversations",
    "embeddings",
    "evals",
    "files",
    "images",
    "models",
    "moderations",
    "responses",
    "threads",
    "uploads",
    "vector_stores",
    "videos",
}


# BFL's own, where no model is named.
BFLS = {"get_result", "cancel", "jobs", "credits", "my_finetunes"}


def path_of(scope: Scope) -> str:
    """As the routes know it: without what Serve's route prefix adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def dialect_of(request: Request, path: str | None = None) -> Dialect:
    """OpenAI's where it is no other's; `app.state.bfl_paths` are BFL's.

    `path`: instead of the request's own.
    """
    path = path_of(request.scope) if path is None else path
    if path.startswith(HUB):
        return "hugging_face"
    bfl_paths = request.app.state.bfl_paths
    # A model that is not served: its client has to read why.
    return "bfl" if path in bfl_paths or (bfl_paths and model_in(request)) else "openai"


def model_in(request: Request) -> str | None:
    """The model of which a path of BFL's is, whether or not it is served; None of other paths."""
    return model_at(request.method, path_of(request.scope))


def dialect_at(method: str, path: str) -> Dialect:
    """Of a path where it is not known which models are served, and whether there are jobs."""
    if path.startswith(HUB):
        return "hugging_face"
    is_bfls = path.removeprefix("/v1/") in BFLS or model_at(method, path) is not None
    return "bfl" if is_bfls else "openai"


def model_at(method: str, path: str) -> str | None:
    """As model_in."""
    if method != "POST":
        return None
    if path.startswith(COMFY) and path.endswith(GENERATE):
        return path.removeprefix(COMFY).removesuffix(GENERATE)
    name = path.removeprefix("/v1/")
    return None if name == path or "/" in name or name in OPENAIS else name
