"""
A chat server: a page to talk to the model on, and an OpenAI-compatible API.

    python -m scripts.chat_web                      # then open http://127.0.0.1:8000
    python -m scripts.chat_web -i rl -g d20 --port=9000
    python -m scripts.chat_web --host=0.0.0.0 --api_key_file=key.txt    # for others too

    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
        -d '{"messages": [{"role": "user", "content": "What is 27 + 15?"}], "stream": true}'

    from openai import OpenAI
    client = OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="none")

Routes and shapes: nanochat/serve/api.py, and /openapi.json of the running server. Requests share a
batch; each GPU that is visible (CUDA_VISIBLE_DEVICES) gets a copy of the model. Ctrl-C stops it.
"""

from __future__ import annotations

from dataclasses import dataclass

from nanochat import distributed, flags
from nanochat.checkpoint import load_model
from nanochat.common import print0
from nanochat.engine import Engine
from nanochat.precision import choose_precision
from nanochat.serve.api import create_app
from nanochat.serve.options import ServeFlags, access_of, devices_of, limits_of, step_of
from nanochat.serve.run import listen, make_server
from nanochat.serving import make_ready


@dataclass
class Args(ServeFlags):
    """Serves a trained model: the chat page at /, OpenAI's API at /v1."""


def main(args: Args) -> None:
    """Loads the model and serves it until interrupted."""
    args.check()
    access = access_of(args)
    with listen(args.host, args.port) as listener, distributed.session(args.device_type) as info:
        engines = []
        for device in devices_of(args, info.device):
            model, tokenizer, meta = load_model(
                args.source, device, model_tag=args.model_tag, step=args.step
            )
            ready = make_ready(model, choose_precision(args.dtype, device).dtype, args.quantize)
            step = step_of(args, device)
            engines.append(Engine(ready, tokenizer, tools=args.tools, step=step))
        limits = limits_of(args, model.config.sequence_len)
        # What clients know the model by: sft-d20.
        name = f"{args.source}-{meta['tag']}"
        app = create_app(engines, tokenizer, name, limits, access)
        app.state.pool.warm_up()
        host, port = listener.getsockname()[:2]
        host = f"[{host}]" if ":" in host else host
        print0(f"serving {name} at http://{host}:{port} (Ctrl-C stops)")
        make_server(app, args.shutdown_timeout).run(sockets=[listener])


if __name__ == "__main__":
    flags.run(main, Args)
