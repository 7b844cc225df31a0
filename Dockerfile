# An image of gpt2-engine, from the repository root. For a CPU:
#
#     docker build -t gpt2-engine .
#     docker run --rm --network none -v "$PWD/work:/work" gpt2-engine train tiny --data data/stdlib
#
# For NVIDIA GPUs, with their driver and its container toolkit on the host:
#
#     docker build -t gpt2-engine --build-arg BASE=nvidia/cuda:13.0.1-base-ubuntu24.04 --build-arg TORCH_INDEX= .
#     docker run --rm --network none --gpus all --shm-size 16g -v "$PWD/work:/work" gpt2-engine train gpt2
#
# The user in it has the number 10001, to which the directory mounted at /work must be open.

# A Debian or Ubuntu with Python 3.11 or newer, or none: then the distribution's own is installed.
ARG BASE=python:3.12-slim-bookworm
FROM ${BASE}

# PyTorch's index of CPU wheels. Empty: PyPI's wheel, which brings the CUDA libraries along.
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# torch.compile builds C++ on a CPU, Triton C on a GPU. The system's Python is taken where the base has none.
# A version of g++ would tie the file to one base.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && (command -v python3 || apt-get install --yes --no-install-recommends python3-dev python3-venv) \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --create-home gpt2 \
    && install --directory --owner gpt2 --group gpt2 /work \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1

# The large packages first: a change of the code below keeps their layer.
WORKDIR /app
COPY constraints.txt ./
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} torch triton
COPY setup.py pyproject.toml LICENSE ./
COPY kernels kernels
COPY model model
COPY engine engine
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e '.[data]'

# The code is root's. A run needs no network and writes to /work, /home/gpt2 and /tmp.
USER 10001
WORKDIR /work
ENTRYPOINT ["gpt2"]
CMD ["--help"]
