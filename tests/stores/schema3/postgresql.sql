CREATE SCHEMA zflake;
CREATE TABLE zflake.life (
    one integer NOT NULL
);
CREATE TABLE zflake.machine (
    machine bigint NOT NULL,
    fence bigint NOT NULL,
    gen bigint NOT NULL,
    token bytea,
    start bigint NOT NULL,
    tenancy_start bigint NOT NULL,
    span_start bigint NOT NULL,
    holder text NOT NULL
);
CREATE TABLE zflake.mark (
    delegator text NOT NULL,
    now_us bigint NOT NULL,
    lead_us bigint NOT NULL,
    address text NOT NULL
);
CREATE TABLE zflake.meta (
    one integer NOT NULL,
    schema integer NOT NULL,
    reader integer NOT NULL,
    store_id text NOT NULL,
    layout text NOT NULL,
    ttl bigint NOT NULL,
    first_machine bigint NOT NULL,
    last_machine bigint NOT NULL,
    floor bigint NOT NULL,
    version bigint NOT NULL,
    incarnation text NOT NULL,
    moved text NOT NULL,
    since bigint DEFAULT 0 NOT NULL,
    CONSTRAINT meta_one_check CHECK ((one = 1))
);
CREATE TABLE zflake.span (
    machine bigint NOT NULL,
    start bigint NOT NULL,
    stop bigint NOT NULL,
    holder text NOT NULL
);
INSERT INTO zflake.life VALUES (1);
INSERT INTO zflake.machine VALUES (9, 90, 2, NULL, 50, 50, 50, '["a second worker", "host two", 17, ""]');
INSERT INTO zflake.machine VALUES (1, 1099511627776, 3, '\x030405060708090a0b0c0d0e0f101112', 5000, 1000, 5000, '["w\u00f6rker \u2603 ''one''", "h\u00f6st\u0000name", 4194304, "tcp://10.0.0.1:7411"]');
INSERT INTO zflake.machine VALUES (2, 1099511627783, 1, '\x1415161718191a1b1c1d1e1f20212223', 1500, 1500, 1500, '["a second worker", "host two", 17, ""]');
INSERT INTO zflake.machine VALUES (1023, 1099511627779, 1, '\x28292a2b2c2d2e2f3031323334353637', 1600, 1600, 1600, '["", "", 0, ""]');
INSERT INTO zflake.machine VALUES (5, 3500, 2, NULL, 3000, 3000, 3000, '["w\u00f6rker \u2603 ''one''", "h\u00f6st\u0000name", 4194304, "tcp://10.0.0.1:7411"]');
INSERT INTO zflake.mark VALUES ('127.0.0.1:7410', 1767225600000003, 250, 'tcp://127.0.0.1:7410');
INSERT INTO zflake.mark VALUES ('another é delegator/2', 1767225601000000, -5, '');
INSERT INTO zflake.meta VALUES (1, 3, 3, 'store of schema 3 — é', '{"name": "snowcloud", "fields": [["time", 42], ["machine", 10], ["sequence", 12]], "epoch_ms": 1577836800000, "tick_ms": 1, "machine_parts": []}', 30000, 0, 1023, 1000, 42, '7712638152740818012/00000001/16384/725', '', 90);
INSERT INTO zflake.span VALUES (1, 1000, 3000, '["w\u00f6rker \u2603 ''one''", "h\u00f6st\u0000name", 4194304, "tcp://10.0.0.1:7411"]');
INSERT INTO zflake.span VALUES (1, 5000, 1099511627776, '["w\u00f6rker \u2603 ''one''", "h\u00f6st\u0000name", 4194304, "tcp://10.0.0.1:7411"]');
INSERT INTO zflake.span VALUES (2, 1500, 1099511627783, '["a second worker", "host two", 17, ""]');
INSERT INTO zflake.span VALUES (1023, 1600, 1099511627779, '["", "", 0, ""]');
INSERT INTO zflake.span VALUES (5, 3000, 3500, '["w\u00f6rker \u2603 ''one''", "h\u00f6st\u0000name", 4194304, "tcp://10.0.0.1:7411"]');
ALTER TABLE ONLY zflake.life
    ADD CONSTRAINT life_pkey PRIMARY KEY (one);
ALTER TABLE ONLY zflake.machine
    ADD CONSTRAINT machine_pkey PRIMARY KEY (machine);
ALTER TABLE ONLY zflake.machine
    ADD CONSTRAINT machine_token_key UNIQUE (token);
ALTER TABLE ONLY zflake.mark
    ADD CONSTRAINT mark_pkey PRIMARY KEY (delegator);
ALTER TABLE ONLY zflake.meta
    ADD CONSTRAINT meta_pkey PRIMARY KEY (one);
ALTER TABLE ONLY zflake.span
    ADD CONSTRAINT span_pkey PRIMARY KEY (machine, start);
CREATE INDEX machine_by_fence ON zflake.machine USING btree (fence, machine);
CREATE INDEX span_by_stop ON zflake.span USING btree (stop);
