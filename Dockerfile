# docker build -t sedtrain .
# docker run --rm -it --gpus all --ipc=host --user "$(id -u):$(id -g)" -v "$PWD:/work" -v "$HOME/.cache/huggingface:/home/user/.cache/huggingface" sedtrain encoder=hubert decoder=bert
# docker run --rm -it -p 127.0.0.1:8000:8000 --user "$(id -u):$(id -g)" -v "$PWD:/work" sedtrain task=serve checkpoint=RUN serve.host=0.0.0.0
FROM python:3.12-slim
# git names the commit of what is mounted at /work, whoever owns it; g++ builds the kernels of torch.compile
RUN apt-get update && apt-get install -y --no-install-recommends g++ git && rm -rf /var/lib/apt/lists/* \
    && git config --system safe.directory '*'
# --user may be anyone: all may write to the home, and torch asks for a name
ENV HOME=/home/user USER=user
RUN useradd --create-home --uid 1000 user && install -d -m 1777 /home/user /home/user/.cache /work
# torch is most of the image, and is downloaded anew only where a version changes
COPY constraints.txt /opt/sedtrain/
RUN pip install --no-cache-dir -c /opt/sedtrain/constraints.txt torch
COPY . /opt/sedtrain
RUN pip install --no-cache-dir -c /opt/sedtrain/constraints.txt "/opt/sedtrain[lora,onnx,optuna,serve,tensorboard,vad]"
USER user
WORKDIR /work
ENTRYPOINT ["python", "-m", "sedtrain"]
