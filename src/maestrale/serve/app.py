"""The application: every route, and what stands around them."""

from __future__ import annotations

from functools import partial

from starlette.middleware.cors import CORSMiddleware
from starlette.routing import Match, Route, Router
from starlette.types import ASGIApp, Scope

from maestrale.serve.chat import chat
from maestrale.serve.completions import completions
from maestrale.serve.context import Context
from maestrale.serve.embeddings import embeddings
from maestrale.serve.fim import fill_in
from maestrale.serve.middleware import Front, Guard, Limits
from maestrale.serve.models import model, models
from maestrale.serve.openapi import openapi
from maestrale.serve.page import page
from maestrale.serve.status import health, metrics, ready, version
from maestrale.serve.tokens import detokenize, tokenize, tokenizer_info

ROUTES = [
    ("POST", "/v1/chat/completions", chat),
    ("POST", "/v1/completions", completions),
    ("POST", "/v1/fim/completions", fill_in),
    ("POST", "/v1/embeddings", embeddings),
    ("GET", "/v1/models", models),
    ("GET", "/v1/models/{id:path}", model),
    ("POST", "/tokenize", tokenize),
    ("POST", "/detokenize", detokenize),
    ("GET", "/tokenizer_info", tokenizer_info),
    ("GET", "/health", health),
    ("GET", "/ready", ready),
    ("GET", "/version", version),
    ("GET", "/metrics", metrics),
    ("GET", "/openapi.json", openapi),
    ("GET", "/", page),
    ("GET", "/page/{name}", page),
]


def make_app(context: Context) -> ASGIApp:
    settings = context.settings
    routes = [Route(path, partial(function, context), methods=[method]) for method, path, function in ROUTES]
    router = Router(routes, redirect_slashes=False)

    def route_of(scope: Scope) -> str:
        """A route's path, for counting: never what a client made up."""
        return next((route.path for route in routes if route.matches(scope)[0] is not Match.NONE), "none")

    app: ASGIApp = Front(Guard(Limits(router, settings), settings), context.metrics, route_of)
    if settings.cors_origins:
        app = CORSMiddleware(
            app,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            expose_headers=["x-request-id"],
        )
    return app
