-- wrk's script: ready-made requests in a given order, and the figures as one line of JSON.
-- Arguments: content type, file of bodies, file of places, where to begin.
-- One thread only: all its connections take the next request from one list.

local requests, places, at = {}, {}, 0

function init(arguments)
  local content_type, bodies, order, begin = unpack(arguments)
  local head = "POST " .. wrk.path .. " HTTP/1.1\r\nHost: " .. wrk.host .. "\r\nContent-Type: " .. content_type
  local file = assert(io.open(bodies, "rb"))
  while true do
    local size = file:read(4)
    if not size then break end
    local a, b, c = size:byte(1, 3)
    local length = a + 256 * b + 65536 * c
    requests[#requests + 1] = head .. "\r\nContent-Length: " .. length .. "\r\n\r\n" .. file:read(length)
  end
  file:close()
  for line in io.lines(order) do places[#places + 1] = tonumber(line) + 1 end
  at = tonumber(begin) - 1 -- wrk asks for one more before the first, to see that it is whole
end

function request()
  at = at + 1
  return requests[places[(at - 1) % #places + 1]]
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "refused": %d, "lost": %d, "p50_ms": %.3f, "p90_ms": %.3f, "p99_ms": %.3f}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(90) / 1e3, latency:percentile(99) / 1e3
  ))
end
