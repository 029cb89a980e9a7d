// Draws a sample through the page in headless Chromium and prints its pixels, for tests and screenshots.
//
//     node draw.mjs URL CHROMIUM SEED SAMPLE RESOLUTION... [--screenshot FILE]

import { parseArgs } from "node:util";
import { chromium } from "playwright-core";

const { values: flags, positionals } = parseArgs({
  allowPositionals: true,
  options: { screenshot: { type: "string" } },
});
const [url, executablePath, seed, sample, ...resolutions] = positionals;

const quiet = ["--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync"];
const browser = await chromium.launch({ executablePath, args: quiet });
const page = await browser.newPage({ viewport: { width: 1000, height: 780 } });
const answer = { complaints: [], pictures: [] };
page.on("console", (message) => answer.complaints.push(message.text()));
page.on("pageerror", (error) => answer.complaints.push(String(error)));

await page.goto(url);
await page.waitForFunction(() => !document.querySelector("#generate").disabled || document.querySelector(".wrong"));
if (await page.locator("#generate").isEnabled()) {
  await page.fill("#seed", seed);
  await page.fill("#sample", sample);
  await page.click("#generate");
  await page.waitForSelector("#earlier canvas");
  for (const resolution of resolutions) {
    await page.locator("#resolution").fill(resolution);
    await page.waitForFunction((size) => document.querySelector("#picture").width === Number(size), resolution);
    answer.pictures.push(
      await page.evaluate(() => {
        const picture = document.querySelector("#picture");
        const copy = new OffscreenCanvas(picture.width, picture.height).getContext("2d");
        copy.drawImage(picture, 0, 0);
        return [...copy.getImageData(0, 0, picture.width, picture.height).data];
      }),
    );
  }
}
for (const id of ["status", "caption", "sampling", "drawing"]) answer[id] = await page.textContent(`#${id}`);
if (flags.screenshot) await page.screenshot({ path: flags.screenshot });
await browser.close();
console.log(JSON.stringify(answer));
