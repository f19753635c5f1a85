// Search in pages opened from a disk: browsers refuse workers there, so a hidden frame runs the worker's script.
// The name is the one that the theme's plugin for offline use looks for, so that it loads no other from the network.
if (window.location.protocol === "file:") {
  window.IFrameWorker = window.Worker = class extends EventTarget {
    constructor(url) {
      super();
      const frame = document.createElement("iframe");
      frame.hidden = true;
      document.body.append(frame);
      this.inner = frame.contentWindow;
      this.inner.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }));
      const load = (source) => new Promise((resolve, reject) => {
        const script = this.inner.document.createElement("script");
        Object.assign(script, { src: source, onload: resolve, onerror: reject });
        this.inner.document.head.append(script);
      });
      this.inner.importScripts = (...sources) => Promise.all(sources.map(load));
      this.ready = load(new URL(url, document.baseURI));
    }

    postMessage(data) {
      this.ready.then(() => this.inner.dispatchEvent(new MessageEvent("message", { data })));
    }

    terminate() {
      this.inner.frameElement.remove();
    }
  };
}
