// Opens a page in headless Chromium, runs a script on it and prints what that returns, for tests.
//
//     node drive.mjs URL CHROMIUM [JSON of newPage's options] < script
//
// The script is the body of an asynchronous function of `page`, Playwright's. Whatever the page complains about on its
// console comes along.

import { readFileSync } from "node:fs";
import { chromium } from "playwright-core";

const [url, executablePath, options = "{}"] = process.argv.slice(2);
const args = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
args.push("--use-angle=swiftshader", "--enable-unsafe-swiftshader"); // WebGL and WebGPU without a graphics processor
args.push("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader", "--enable-features=Vulkan");
const browser = await chromium.launch({ executablePath, args });
try {
  const page = await browser.newPage({ viewport: { width: 1200, height: 1000 }, ...JSON.parse(options) });
  page.setDefaultTimeout(60_000);
  const complaints = [];
  page.on("console", (message) => message.type() === "error" && complaints.push(message.text()));
  page.on("pageerror", (error) => complaints.push(String(error)));
  page.on("request", (request) => /^(data|blob|file):|127\.0\.0\.1/.test(request.url()) || complaints.push(request.url()));
  await page.goto(url);
  const script = Object.getPrototypeOf(async () => {}).constructor("page", readFileSync(0, "utf8"));
  console.log(JSON.stringify({ found: await script(page), complaints }));
} finally {
  await browser.close();
}
