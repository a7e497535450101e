-- What browser.js cannot make by clicking: links of many ages, months of clicks, and a referrer
-- that is an attack.

INSERT INTO urls (short_code, original_url, title, is_active, created_at, updated_at)
SELECT 'note' || n, 'https://docs.example.com/notes/' || n, 'Note ' || n, n % 5 <> 0,
       utc - n * interval '31 hours', utc
FROM (SELECT n, date_trunc('second', now() AT TIME ZONE 'UTC') AS utc
      FROM generate_series(30, 1, -1) AS n) AS note;

INSERT INTO urls (short_code, original_url, title, created_at, updated_at)
SELECT code, target, title, utc - age, utc
FROM (VALUES
    ('attacked', 'https://example.com/?"><script>alert(1)</script>',
     '"><script>alert(1)</script>', interval '3 days'),
    ('million', 'https://example.com/million', 'Ten million clicks', interval '6 days'),
    ('handbook', 'https://docs.example.com/team/handbook/2026/first-day?from=mail',
     'Handbook: your first day', interval '200 days'),
    ('launch', 'https://www.example.com/products/launch/2026?utm_source=newsletter',
     'Launch of the new site', interval '100 days')
) AS l (code, target, title, age),
     (SELECT date_trunc('second', now() AT TIME ZONE 'UTC') AS utc) AS clock;

-- Weeks with quiet weekends, and a day in the news.
INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
SELECT id, CURRENT_DATE - ago, referrer,
       share * CASE WHEN ago = 41 THEN 900
                    WHEN extract(isodow FROM CURRENT_DATE - ago) > 5 THEN 40 + ago % 7
                    ELSE 160 + ago * 37 % 90 END, share
FROM urls, generate_series(0, 89) AS ago,
     (VALUES ('', 5), ('news.example', 3), ('chat.example', 2), ('search.example', 1))
     AS source (referrer, share)
WHERE short_code = 'launch';

INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
SELECT id, CURRENT_DATE - ago, '', 10000000 / (ago + 1), 0
FROM urls, generate_series(0, 6, 2) AS ago WHERE short_code = 'million';

INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
SELECT id, CURRENT_DATE, '"><script>alert(1)</script>', 7, 2 FROM urls
WHERE short_code = 'attacked';

INSERT INTO clicks_daily (url_id, day, referrer, clicks, bots)
SELECT id, CURRENT_DATE - 2, '', 1200, 3 FROM urls WHERE short_code = 'handbook';

UPDATE urls SET click_count = n, last_clicked_at = date_trunc('second', now() AT TIME ZONE 'UTC')
FROM (SELECT url_id, sum(clicks) AS n FROM clicks_daily GROUP BY url_id) AS counted
WHERE id = url_id;
