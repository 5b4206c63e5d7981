# An image that serves. On a CPU:
#     docker build -t vibe-sgl-lite .
#     docker run -p 30000:30000 -v models:/models vibe-sgl-lite --model-path /models/Qwen3-0.6B --api-key KEY
# On a GPU: the same image, whose torch brings CUDA, run with `--gpus all`. A smaller image for CPUs alone takes torch's
# CPU build: docker build --build-arg PIP_ARGS="--extra-index-url <torch's index of CPU wheels>" -t vibe-sgl-lite .
FROM python:3.12-slim

# The kernels for this CPU, and Triton's launchers on a GPU, are compiled when the engine first starts.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*

ARG PIP_ARGS=""
COPY . /src
RUN pip install --no-cache-dir $PIP_ARGS -c /src/constraints.txt '/src[grammar,yaml]' && rm -rf /src

RUN useradd --create-home vibe
USER vibe
VOLUME /home/vibe/.cache
EXPOSE 30000
HEALTHCHECK --start-period=120s CMD python -c "import urllib.request as u; u.urlopen('http://127.0.0.1:30000/health')"
# Beyond loopback only with a key: pass --api-key KEY, or --insecure where the network is your own.
ENTRYPOINT ["vibe-sgl-lite", "--host", "0.0.0.0"]
