# The demo in a container:  docker build --tag embedgrad . && docker run --rm embedgrad
FROM python:3.11-slim
RUN apt-get update && apt-get install --yes --no-install-recommends make \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home embedgrad && install --directory --owner=embedgrad /srv/embedgrad
USER embedgrad
WORKDIR /srv/embedgrad
COPY --chown=embedgrad . .
# Installation, model and data belong to the image; the demo itself needs no network.
RUN make .venv/installed .venv/model data/reviews/manifest.json
CMD ["make", "demo"]
