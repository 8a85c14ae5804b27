-- One commit: steps, each of which compares some keys and, if they are as they must be, writes some.
--
--   KEYS[1]   hash: under "text" the meta, a JSON object
--   KEYS[2]   hash: every other key -> its value
--   KEYS[3]   sorted set, all scores 0: every other key, so that the order is the text's
--
-- ARGV[1]: nothing, to be told which life of the data this is; or the steps as JSON, each of them
--   [[[key, text], ...], [[key, text], ...]]
-- first the conditions: the key's value begins with the text, or is not there if that is null; then the writes:
-- put the text under the key, or remove the key if it is null.
--
-- If the first step's conditions don't hold, nothing is written.  The steps behind it are written only if the
-- meta says that it is of this life.  Gives 1 or 0 for each step.

local meta = redis.call('HGET', KEYS[1], 'text')
local incarnation = meta and cjson.decode(meta).incarnation

-- The life is the server's run ID, and the replication ID that the server was promoted from.  Its own replication
-- ID is left out, since that changes with the first replica, too.  A server forgets from where it was promoted an
-- hour after its last replica has gone; that is no other life.
local function life()
  local server, replication = redis.call('INFO', 'server'), redis.call('INFO', 'replication')
  local run, from = string.match(server, 'run_id:(%x+)'), string.match(replication, 'master_replid2:(%x+)')
  local role = string.match(replication, 'role:(%a+)')
  if role ~= 'master' then
    return run .. ' ' .. from .. ' ' .. role
  end
  if incarnation and string.match(incarnation, '^%x+ %x+$')
      and string.sub(incarnation, 1, #run + 1) == run .. ' ' and string.match(from, '^0+$') then
    return incarnation
  end
  return run .. ' ' .. from
end

if #ARGV == 0 then
  return life()
end

local function get(key)
  if key == 'meta' then
    return redis.call('HGET', KEYS[1], 'text')
  end
  return redis.call('HGET', KEYS[2], key)
end

local function holds(conditions)
  for _, condition in ipairs(conditions) do
    local value, text = get(condition[1]), condition[2]
    local wanted = text ~= cjson.null
    if wanted and not (value and string.sub(value, 1, #text) == text) or not wanted and value then
      return false
    end
  end
  return true
end

local function write(key, text)
  if key == 'meta' then
    redis.call('HSET', KEYS[1], 'text', text)
  elseif text ~= cjson.null then
    redis.call('HSET', KEYS[2], key, text)
    redis.call('ZADD', KEYS[3], 0, key)
  else
    redis.call('HDEL', KEYS[2], key)
    redis.call('ZREM', KEYS[3], key)
  end
end

local outcomes, known = {}, incarnation == life()
for at, step in ipairs(cjson.decode(ARGV[1])) do
  local holding = (at == 1 or known) and holds(step[1])
  outcomes[at] = holding and 1 or 0
  if holding then
    for _, pair in ipairs(step[2]) do
      write(pair[1], pair[2])
    end
  elseif at == 1 then
    return outcomes
  end
end
return outcomes
