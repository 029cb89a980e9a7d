// Shapes that turn: rays march through a grid of values, one byte a voxel, 128 at the surface. WebGL 2, nothing else.
const VERTEX = `#version 300 es
in vec2 corner;
out vec2 place;
void main() { place = corner; gl_Position = vec4(corner, 0.0, 1.0); }`;

const FRAGMENT = `#version 300 es
precision highp float;
precision highp sampler3D;
uniform sampler3D grid;
uniform mat3 axes; // columns: right, up, towards the camera
in vec2 place;
out vec4 colour;
const float LEVEL = 128.0 / 255.0;
float value(vec3 point) { return texture(grid, point * 0.5 + 0.5).r - LEVEL; }
void main() {
  vec3 origin = axes * vec3(place * 1.75, 3.0);
  vec3 direction = -axes[2];
  vec3 safe = mix(direction, vec3(1e-6), lessThan(abs(direction), vec3(1e-6)));
  vec3 one = (-1.0 - origin) / safe, other = (1.0 - origin) / safe;
  vec3 near = min(one, other), far = max(one, other);
  float begin = max(max(near.x, near.y), near.z), end = min(min(far.x, far.y), far.z);
  colour = vec4(0.0);
  if (begin >= end) return;
  float size = float(textureSize(grid, 0).x), stride = 0.5 / size; // a quarter of a voxel
  float depth = begin + 1e-4;
  bool found = value(origin + direction * depth) > 0.0, wall = found;
  while (!found && (depth += stride) < end) found = value(origin + direction * depth) > 0.0;
  if (!found) return;
  vec3 normal = vec3(equal(near, vec3(begin))) * -sign(direction); // where the box cuts the shape
  if (!wall) {
    float outside = depth - stride;
    for (int halving = 0; halving < 6; halving++) {
      float middle = 0.5 * (outside + depth);
      if (value(origin + direction * middle) > 0.0) depth = middle; else outside = middle;
    }
    vec3 point = origin + direction * depth;
    vec2 step = vec2(1.5 / size, 0.0);
    normal = -vec3(value(point + step.xyy) - value(point - step.xyy), value(point + step.yxy) - value(point - step.yxy),
      value(point + step.yyx) - value(point - step.yyx));
  }
  vec3 light = axes * normalize(vec3(-0.4, 0.7, 0.7));
  float shade = 0.85 * (0.35 + 0.65 * max(dot(normalize(normal + 1e-6), light), 0.0));
  colour = vec4(vec3(shade), 1.0);
}`;

/** A canvas that shows a volume {size, data} and turns: by itself, by dragging, and by the arrow keys. */
class Shape {
  constructor(pixels = 512) {
    this.canvas = document.createElement("canvas");
    [this.canvas.width, this.canvas.height] = [pixels, pixels];
    this.canvas.setAttribute("role", "img");
    this.canvas.setAttribute("aria-label", "The shape; drag to turn it");
    this.gl = this.canvas.getContext("webgl2");
    [this.azimuth, this.elevation, this.turning] = [35, 25, !STILL];
    if (this.gl) this.prepare();
    this.canvas.addEventListener("pointerdown", (event) => this.canvas.setPointerCapture(event.pointerId));
    this.canvas.addEventListener("pointermove", (event) => {
      if (event.buttons) this.turn(-event.movementX / 2, event.movementY / 2);
    });
  }

  prepare() {
    const gl = this.gl;
    this.program = gl.createProgram();
    for (const [kind, source] of [[gl.VERTEX_SHADER, VERTEX], [gl.FRAGMENT_SHADER, FRAGMENT]]) {
      const shader = gl.createShader(kind);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(this.program, shader);
    }
    gl.bindAttribLocation(this.program, 0, "corner");
    gl.linkProgram(this.program);
    if (!gl.getProgramParameter(this.program, gl.LINK_STATUS)) throw new Error(gl.getProgramInfoLog(this.program));
    gl.useProgram(this.program);
    gl.bindBuffer(gl.ARRAY_BUFFER, gl.createBuffer());
    gl.bufferData(gl.ARRAY_BUFFER, new Float32Array([-1, -1, 3, -1, -1, 3]), gl.STATIC_DRAW);
    gl.enableVertexAttribArray(0);
    gl.vertexAttribPointer(0, 2, gl.FLOAT, false, 0, 0);
    gl.bindTexture(gl.TEXTURE_3D, gl.createTexture());
    for (const axis of [gl.TEXTURE_WRAP_S, gl.TEXTURE_WRAP_T, gl.TEXTURE_WRAP_R]) {
      gl.texParameteri(gl.TEXTURE_3D, axis, gl.CLAMP_TO_EDGE);
    }
    gl.texParameteri(gl.TEXTURE_3D, gl.TEXTURE_MIN_FILTER, gl.LINEAR);
    gl.texParameteri(gl.TEXTURE_3D, gl.TEXTURE_MAG_FILTER, gl.LINEAR);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
  }

  /** Shows a volume, indexed [x, y, z]; a texture's first axis is the last one. Throws where there is no WebGL 2. */
  async show({ size, data }) {
    const gl = this.gl;
    if (!gl) throw new Error("this browser has no WebGL 2");
    const packed = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const values = new Uint8Array(await new Response(stream).arrayBuffer());
    gl.texImage3D(gl.TEXTURE_3D, 0, gl.R8, size, size, size, 0, gl.RED, gl.UNSIGNED_BYTE, values);
    this.shown = true;
    this.draw();
  }

  turn(right, up) {
    this.azimuth += right;
    this.elevation = Math.min(Math.max(this.elevation + up, -89), 89);
    this.draw();
  }

  draw() {
    if (!this.shown) return;
    const gl = this.gl;
    const [azimuth, elevation] = [this.azimuth, this.elevation].map((degrees) => (degrees * Math.PI) / 180);
    const [sin, cos, rise, reach] = [Math.sin(azimuth), Math.cos(azimuth), Math.sin(elevation), Math.cos(elevation)];
    const columns = [[cos, 0, -sin], [-rise * sin, reach, -rise * cos], [reach * sin, rise, reach * cos]];
    const reversed = columns.flatMap(([x, y, z]) => [z, y, x]); // the texture's axes are z, y, x
    gl.uniformMatrix3fv(gl.getUniformLocation(this.program, "axes"), false, reversed);
    gl.viewport(0, 0, this.canvas.width, this.canvas.height);
    gl.drawArrays(gl.TRIANGLES, 0, 3);
  }

  /** Turns until it is not shown any more. */
  start() {
    cancelAnimationFrame(this.frame);
    const step = () => {
      if (!this.canvas.isConnected || !this.canvas.closest("dialog")?.open) return;
      if (this.turning) this.turn(0.4, 0);
      this.frame = requestAnimationFrame(step);
    };
    step();
  }
}
