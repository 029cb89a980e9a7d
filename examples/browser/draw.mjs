// Draws one picture through the page in headless Chromium and prints its pixels, for tests and screenshots.
//
//     node draw.mjs URL CHROMIUM SEED SAMPLE RESOLUTION [SCREENSHOT]

import { chromium } from "playwright-core";

const [url, executablePath, seed, sample, resolution, screenshot] = process.argv.slice(2);
const quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath, args: quiet });
const page = await browser.newPage({ viewport: { width: 1000, height: 760 } });
const complaints = [];
page.on("console", (message) => complaints.push(message.text()));
page.on("pageerror", (error) => complaints.push(String(error)));
await page.goto(url);
await page.waitForFunction(() => !document.querySelector("#generate").disabled || document.querySelector(".wrong"));

const answer = {};
if (await page.locator("#generate").isEnabled()) {
  await page.fill("#seed", seed);
  await page.fill("#sample", sample);
  await page.click("#generate");
  await page.waitForSelector("#earlier canvas");
  await page.locator("#resolution").fill(resolution);
  await page.waitForFunction((size) => document.querySelector("#picture").width === Number(size), resolution);
  answer.pixels = await page.evaluate(() => {
    const canvas = document.querySelector("#picture");
    return [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data];
  });
}
for (const id of ["status", "caption", "sampling", "drawing"]) answer[id] = await page.textContent(`#${id}`);
if (screenshot) await page.screenshot({ path: screenshot });
await browser.close();
console.log(JSON.stringify({ ...answer, complaints }));
