"""The app: open a slide, look at the patches that were selected, ask about it, see what the answer rests on.

python app.py [--host 127.0.0.1] [--port 7860] [--model assets/demo-model] [--auth name:password] [--log FILE] [--mcp]

The same as `sparsewsi app`. A Hugging Face Space runs this file. sparsewsi/web: what the app is made of.
"""

import sys

from sparsewsi.__main__ import run_app

if __name__ == "__main__":
    sys.exit(run_app(sys.argv[1:]))
