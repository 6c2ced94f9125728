# docker build -t sedtrain .
# docker run --rm -it --gpus all --ipc=host -v "$PWD:/work" -v "$HOME/.cache/huggingface:/home/user/.cache/huggingface" sedtrain encoder=hubert decoder=bert
# docker run --rm -it -p 127.0.0.1:8000:8000 -v "$PWD:/work" sedtrain task=serve checkpoint=RUN serve.host=0.0.0.0
FROM python:3.12-slim
# git names the commit of a run; gcc builds the kernels of torch.compile
RUN apt-get update && apt-get install -y --no-install-recommends gcc git libc6-dev && rm -rf /var/lib/apt/lists/*
COPY . /opt/sedtrain
RUN pip install --no-cache-dir -c /opt/sedtrain/constraints.txt "/opt/sedtrain[lora,onnx,optuna,serve,tensorboard,vad]"
RUN useradd --create-home --uid 1000 user && install -d -o user /work
USER user
WORKDIR /work
ENTRYPOINT ["python", "-m", "sedtrain"]
