// Players that show the same moment: one clock for all, every clip is held to it.

// Returns {add, remove, play, step, seek, state}; `onTick(state)` is called for every frame of the screen.
export function players(onTick) {
  const videos = new Set();
  let [place_s, speed, isPlaying, last] = [0, 1, true, performance.now()];

  const lengths = () => [...videos].map((video) => video.duration).filter(Number.isFinite);
  const duration_s = () => Math.max(0, ...lengths());

  // Clips that nobody sees, in another tab of the page, stand still.
  const isRunning = () => isPlaying && [...videos].some((video) => video.offsetParent);

  function hold(video) {
    if (!video.duration || video.readyState < 1) return;
    const wanted = Math.min(place_s, video.duration - 1e-3); // a shorter clip waits on its last frame
    const drift = video.currentTime - wanted;
    if (!isRunning() || place_s >= video.duration) {
      if (!video.paused) video.pause();
      if (Math.abs(drift) > 1e-3 && !video.seeking) video.currentTime = wanted;
      return;
    }
    if (Math.abs(drift) > 0.25 && !video.seeking) video.currentTime = wanted;
    // Small drifts are caught up with by speed, which shows every frame; a seek would stutter.
    const isClose = Math.abs(drift) < frame_s(video) / 4;
    video.playbackRate = speed * (isClose ? 1 : Math.min(2, Math.max(0.5, 1 - drift * 4)));
    if (video.paused) video.play().catch(() => {});
  }

  function tick(now) {
    const end = duration_s();
    if (isRunning() && end) place_s += ((now - last) / 1000) * speed;
    last = now;
    if (end && place_s >= end) {
      place_s %= end;
      for (const video of videos) video.currentTime = 0;
    }
    videos.forEach(hold);
    onTick({ place_s, duration_s: end, isPlaying, isSettled: isPlaying || [...videos].every(isThere) });
    requestAnimationFrame(tick);
  }

  const isThere = (video) => video.readyState > 1 && !video.seeking;

  requestAnimationFrame(tick);
  return {
    // A <video> with `dataset.fps`, frames per second.
    add: (video) => videos.add(video),
    remove(video) {
      video.pause();
      videos.delete(video);
    },
    play(on = !isPlaying) {
      isPlaying = on;
    },
    // Forwards or back by so many of the shortest frames.
    step(frames) {
      isPlaying = false;
      const step_s = Math.min(1, ...[...videos].map(frame_s));
      place_s = Math.max(0, Math.min(duration_s() - 1e-3, place_s + frames * step_s));
    },
    seek(to_s) {
      isPlaying = false;
      place_s = to_s;
    },
    quicken(factor) {
      speed = factor;
    },
  };
}

const frame_s = (video) => 1 / Number(video.dataset.fps);
