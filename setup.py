"""Packaging of sb3_mbpo. Tool settings are in pyproject.toml."""

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# What one command each needs. Only what `import sb3_mbpo` itself needs is a hard dependency.
EXTRAS = {
    # For a person who wants to use it: the README's first program, progress bar, logs, plots. Named as in Stable-Baselines3.
    "extra": ["gymnasium[mujoco]>=1.0", "matplotlib>=3.8", "pandas>=2,<3", "rich", "tensorboard>=2.15", "tqdm"],
    # No upper cap: the Gymnasium tasks also run on MuJoCo 4. dm_control does not yet.
    "mujoco": ["gymnasium[mujoco]>=1.0"],
    "contrib": ["sb3-contrib>=2.9,<3"],
    "box2d": ["gymnasium[box2d]>=1.0"],
    "dm-control": ["shimmy[dm-control]>=2", "mujoco<4"],
    # The Zoo's own plots, and what its options for video, TensorBoard and the classic tasks need besides.
    "zoo": [
        "rl_zoo3[plots]>=2.9.2,<3",
        "sb3-contrib>=2.9,<3",
        "gymnasium[classic-control]>=1.0",
        "moviepy>=1.0",
        "tensorboard>=2.15",
    ],
    # `sb3_mbpo compare`: the Zoo, and its plots' rliable
    "compare": ["rl_zoo3[plots]>=2.9.2,<3", "sb3-contrib>=2.9,<3", "matplotlib>=3.8", "pandas>=2,<3", "rliable>=1.2", "rich"],
    # ... --ray-address
    "ray": ["ray>=2.60,<3"],
    # docs/guide/slurm.py
    "slurm": ["submitit>=1.5,<2"],
    # The Zoo's own plots need pandas 2: the same cap here lets both live in one environment.
    "plots": ["matplotlib>=3.8", "pandas>=2,<3"],
    # `make train`
    "train": ["matplotlib>=3.8", "gymnasium[mujoco]>=1.0", "pyyaml>=6", "rich", "tensorboard>=2.15", "tqdm"],
    # agent.export("policy.onnx"), and what runs the file
    "export": ["onnx>=1.18", "onnxruntime>=1.20", "onnxscript>=0.5"],
    # Datasets for prefill
    "minari": ["minari[hdf5]>=0.5"],
    "docs": ["furo", "myst-parser>=4", "sphinx>=7.4", "sphinx-copybutton"],
    "tests": [
        "black>=26,<27",
        "hypothesis>=6.100",
        "mypy>=1.9,<3",
        "pytest>=8",
        "pytest-timeout>=2.3",
        "pytest-xdist>=3.5",
        "ruff>=0.5.6",
        # tests/test_package.py builds a wheel without a network
        "setuptools>=77",
        "types-PyYAML",
        "wheel",
    ],
}

setup(
    name="sb3_mbpo",
    version=(ROOT / "sb3_mbpo" / "version.txt").read_text(encoding="utf-8").strip(),
    description="Model-Based Policy Optimization (MBPO) for Stable-Baselines3",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="sb3_mbpo contributors",
    license="MIT",
    license_files=["LICENSE"],
    keywords="reinforcement-learning model-based-reinforcement-learning mbpo sac stable-baselines3 pytorch gymnasium",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    install_requires=["stable-baselines3>=2.9,<3", "torch>=2.10", "gymnasium", "typing_extensions>=4.1"],
    extras_require=EXTRAS,
    # The settings per task stay a top-level folder, easy to find and edit; a wheel carries them under the import package.
    packages=[*find_packages(include=["sb3_mbpo", "sb3_mbpo.*"]), "sb3_mbpo.hyperparams"],
    package_dir={"sb3_mbpo": "sb3_mbpo", "sb3_mbpo.hyperparams": "hyperparams"},
    entry_points={"console_scripts": ["sb3_mbpo=sb3_mbpo.__main__:main"]},
    package_data={"sb3_mbpo": ["py.typed", "version.txt"], "sb3_mbpo.hyperparams": ["*.yml"]},
    zip_safe=False,
)
