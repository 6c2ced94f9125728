# docker build -t sedtrain . && docker run --rm -it --gpus all -v "$PWD:/work" sedtrain encoder=hubert decoder=bert
FROM python:3.12-slim
RUN apt-get update && apt-get install -y --no-install-recommends git && rm -rf /var/lib/apt/lists/*
COPY . /opt/sedtrain
RUN pip install --no-cache-dir -c /opt/sedtrain/constraints.txt "/opt/sedtrain[lora,tensorboard,vad]"
RUN useradd --create-home --uid 1000 user
USER user
WORKDIR /work
ENTRYPOINT ["python", "-m", "sedtrain"]
