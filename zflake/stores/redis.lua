-- One commit of zflake's: all swaps or none of them see the same meta, each has its own outcome.
--
-- Every number is a decimal text, zero-padded to 20 digits where it is compared: Lua's numbers end at 2^53.
--
--   meta        hash: text (all of it, see text.py), and of that the version and the incarnation
--   machines    hash: machine -> "gen fence token span_start rest", token in hex or "-"
--   tokens      hash: token -> machine
--   fences      sorted set, all scores 0: "fence machine", so that the order is the text's
--   spans:N     sorted set, all scores 0: "start end holder" of machine N
--   ends        sorted set, all scores 0: "end machine start", for pruning
--   marks       hash: delegator -> "now_us lead_us address"
--   since       from where on the spans are complete
--   filling     is there while the store is filled for the first time
--
-- KEYS[1] names the meta and ends in "meta"; what stands before that is the prefix of all keys.
-- ARGV: nothing, to be told which life this is; or
--       mark's name or "", mark, then for each swap:
--       meta's version, machine, gen before, gen, fence, token or "-", span_start, rest, holder
-- Answers with one 0 or 1 for each swap.

local prefix = string.sub(KEYS[1], 1, -5)
local machines, tokens, fences = prefix .. 'machines', prefix .. 'tokens', prefix .. 'fences'
local ends, marks = prefix .. 'ends', prefix .. 'marks'

local meta = redis.call('HMGET', KEYS[1], 'version', 'incarnation')

-- Which life of the data this is: the server's run ID, and the replication ID that it was promoted from.  Its
-- own replication ID is left out, since it changes with the first replica, too; and that a server forgets where
-- it was promoted from, as it does an hour after its last replica has gone, is no other life.
local function life()
  local server, replication = redis.call('INFO', 'server'), redis.call('INFO', 'replication')
  local run, from = string.match(server, 'run_id:(%x+)'), string.match(replication, 'master_replid2:(%x+)')
  local role = string.match(replication, 'role:(%a+)')
  if role ~= 'master' then
    return run .. ' ' .. from .. ' ' .. role
  end
  if meta[2] and string.match(meta[2], '^%x+ %x+$') and string.sub(meta[2], 1, #run + 1) == run .. ' '
      and string.match(from, '^0+$') then
    return meta[2]
  end
  return run .. ' ' .. from
end

if #ARGV == 0 then
  return life()
end

-- The span of a machine that begins at `start`, or all those that reach above `fence`.
local function drop_span(machine, span)
  redis.call('ZREM', prefix .. 'spans:' .. machine, span)
  redis.call('ZREM', ends, string.sub(span, 22, 41) .. ' ' .. machine .. ' ' .. string.sub(span, 1, 20))
end

local function add_span(machine, start, fence, holder)
  redis.call('ZADD', prefix .. 'spans:' .. machine, 0, start .. ' ' .. fence .. ' ' .. holder)
  redis.call('ZADD', ends, 0, fence .. ' ' .. machine .. ' ' .. start)
end

local function note(machine, fence, token, span_start, holder)
  local spans = prefix .. 'spans:' .. machine
  if token ~= '-' then
    for _, span in ipairs(redis.call('ZRANGEBYLEX', spans, '[' .. span_start .. ' ', '(' .. span_start .. '!')) do
      drop_span(machine, span)
    end
    add_span(machine, span_start, fence, holder)
    return
  end
  while true do
    local span = redis.call('ZREVRANGEBYLEX', spans, '+', '-', 'LIMIT', 0, 1)[1]
    if not span or string.sub(span, 22, 41) <= fence then
      return
    end
    drop_span(machine, span)
    if string.sub(span, 1, 20) < fence then
      add_span(machine, string.sub(span, 1, 20), fence, string.sub(span, 43))
      return
    end
  end
end

local known = meta[2] == life()
if ARGV[1] ~= '' and meta[1] then
  -- A write of unknown outcome may come after the next one: a mark never goes back by one.
  local mark = redis.call('HGET', marks, ARGV[1])
  if not mark or string.sub(mark, 1, 20) < string.sub(ARGV[2], 1, 20) then
    redis.call('HSET', marks, ARGV[1], ARGV[2])
  end
end
local outcomes = {}
for i = 3, #ARGV, 9 do
  local version, machine, before, gen = ARGV[i], ARGV[i + 1], ARGV[i + 2], ARGV[i + 3]
  local fence, token, span_start = ARGV[i + 4], ARGV[i + 5], ARGV[i + 6]
  local rest, holder = ARGV[i + 7], ARGV[i + 8]
  local old = redis.call('HGET', machines, machine)
  local old_gen, old_fence, old_token = '0', nil, '-'
  if old then
    old_gen, old_fence, old_token = string.match(old, '^(%d+) (%d+) (%S+) ')
  end
  local owner = token ~= '-' and redis.call('HGET', tokens, token)
  if known and meta[1] == version and old_gen == before and (not owner or owner == machine) then
    if old_token ~= '-' then
      redis.call('HDEL', tokens, old_token)
    end
    if old_fence then
      redis.call('ZREM', fences, old_fence .. ' ' .. machine)
    end
    if token ~= '-' then
      redis.call('HSET', tokens, token, machine)
    end
    redis.call('ZADD', fences, 0, fence .. ' ' .. machine)
    redis.call('HSET', machines, machine, gen .. ' ' .. fence .. ' ' .. token .. ' ' .. span_start .. ' ' .. rest)
    note(machine, fence, token, span_start, holder)
    outcomes[#outcomes + 1] = 1
  else
    outcomes[#outcomes + 1] = 0
  end
end
return outcomes
