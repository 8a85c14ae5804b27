-- One commit: steps, each of which compares some keys and, if they are as they must be, writes some.
--
--   KEYS[1]   hash: under "text" the meta, a JSON object
--   KEYS[2]   hash: every other key -> its value
--   KEYS[3]   sorted set, all scores 0: every other key, so that the order is the text's
--
-- ARGV: nothing, to be told which life of the data this is; or words that make up the steps:
--   = key text    the key's value must begin with the text
--   ! key         the key must not be there
--   + key value   put the value under the key
--   - key         remove the key
--   ;             ends a step
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

local function put(key, value)
  if key == 'meta' then
    redis.call('HSET', KEYS[1], 'text', value)
  else
    redis.call('HSET', KEYS[2], key, value)
    redis.call('ZADD', KEYS[3], 0, key)
  end
end

local function remove(key)
  redis.call('HDEL', KEYS[2], key)
  redis.call('ZREM', KEYS[3], key)
end

local outcomes, holds, writes, at = {}, true, {}, 1
local known = incarnation == life()
while at <= #ARGV do
  local word, key, text = ARGV[at], ARGV[at + 1], ARGV[at + 2]
  if word == '=' then
    local value = get(key)
    holds = holds and value and string.sub(value, 1, #text) == text
    at = at + 3
  elseif word == '!' then
    holds = holds and not get(key)
    at = at + 2
  elseif word == '+' then
    writes[#writes + 1] = {put, key, text}
    at = at + 3
  elseif word == '-' then
    writes[#writes + 1] = {remove, key}
    at = at + 2
  else
    if #outcomes > 0 then
      holds = holds and known
    end
    if holds then
      for _, write in ipairs(writes) do
        write[1](write[2], write[3])
      end
    end
    outcomes[#outcomes + 1] = holds and 1 or 0
    if outcomes[1] == 0 then
      return outcomes
    end
    holds, writes, at = true, {}, at + 1
  end
end
return outcomes
