"""``python -m speechllm`` is the command ``speechllm``."""

from speechllm.cli import main

main()
