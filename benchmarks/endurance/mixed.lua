-- wrk's script: whole requests of many kinds in a given order, and how often each status was answered.
-- Arguments: file of requests, file of places, where to begin. One thread only, as drive.lua.

local requests, places, at = {}, {}, 0
local driven
statuses = {} -- global, so that done() can ask for it

function setup(thread) driven = thread end

function init(arguments)
  local whole, order, begin = unpack(arguments)
  local file = assert(io.open(whole, "rb"))
  while true do
    local size = file:read(4)
    if not size then break end
    local a, b, c = size:byte(1, 3)
    requests[#requests + 1] = file:read(a + 256 * b + 65536 * c)
  end
  file:close()
  for line in io.lines(order) do places[#places + 1] = tonumber(line) + 1 end
  at = tonumber(begin) - 1 -- wrk asks for one more before the first, to see that it is whole
end

function request()
  at = at + 1
  return requests[places[(at - 1) % #places + 1]]
end

function response(status)
  local name = tostring(status)
  statuses[name] = (statuses[name] or 0) + 1
end

function done(summary, latency)
  local errors, found = summary.errors, {}
  for status, count in pairs(driven:get("statuses")) do
    found[#found + 1] = string.format('"%s": %d', status, count)
  end
  io.write(string.format(
    '{"requests": %d, "seconds": %.6f, "refused": %d, "lost": %d, "p50_ms": %.3f, "p99_ms": %.3f, "statuses": {%s}}\n',
    summary.requests, summary.duration / 1e6, errors.status,
    errors.connect + errors.read + errors.write + errors.timeout,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3, table.concat(found, ", ")
  ))
end
