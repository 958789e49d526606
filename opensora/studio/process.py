"""The process that answers requests and shows the page: `opensora.server.api` with more to it."""

from opensora.server.api import serve
from opensora.studio.app import create_studio_app

if __name__ == "__main__":
    serve(create_studio_app)
