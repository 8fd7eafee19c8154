"""Which dialect a path is of: its errors have that dialect's shape."""

from typing import Literal

from starlette.requests import Request
from starlette.types import Scope

Dialect = Literal["openai", "bfl", "hugging_face"]
# Hugging Face's raw endpoint.
HUB = "/models/"
# Of ComfyUI's nodes for BFL's models.
COMFY = "/proxy/bfl/"


def path_of(scope: Scope) -> str:
    """As the routes know it: without what Serve's route prefix adds."""
    path: str = scope["path"]
    return path.removeprefix(scope.get("root_path", ""))


def dialect_of(request: Request) -> Dialect:
    """OpenAI's where it is no other's; `app.state.bfl_paths` are BFL's."""
    path = path_of(request.scope)
    if path.startswith(HUB):
        return "hugging_face"
    bfl_paths = request.app.state.bfl_paths
    # A model that is not served: its client has to read why.
    is_model = request.method == "POST" and (
        (path.startswith("/v1/") and path.count("/") == 2) or path.startswith(COMFY)
    )
    return "bfl" if path in bfl_paths or (bfl_paths and is_model) else "openai"
